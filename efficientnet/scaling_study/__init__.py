"""The paper's study of scaling: the networks that it compares, its Table 3, the search for the coefficients."""
