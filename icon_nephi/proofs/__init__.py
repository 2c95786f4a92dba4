"""Where a map cannot fold: bounds of its determinant, split until decided."""
