"""Linear sketches of the rows of a matrix, and what decodes them into its heavy entries."""
