"""Triton kernels; every module here is imported when its kernels are first used."""
