"""Clusters of keys: balanced trees, k-means, and the metric in which they are made."""

from .kmeans import kmeans_centres, kmeans_order, nearest_centres
from .metric import balancing, in_metric_of, prefix_moments, second_moment, square_root
from .pca_tree import num_equal_runs, pca_order, pca_orders
from .runs import EqualRuns, equal_runs, gather_runs, run_means

__all__ = [
    "EqualRuns",
    "balancing",
    "equal_runs",
    "gather_runs",
    "in_metric_of",
    "kmeans_centres",
    "kmeans_order",
    "nearest_centres",
    "num_equal_runs",
    "pca_order",
    "pca_orders",
    "prefix_moments",
    "run_means",
    "second_moment",
    "square_root",
]
