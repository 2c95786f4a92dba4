"""What is minimised: similarity, regularity, prior, at sampled places."""
