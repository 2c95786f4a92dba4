"""One pair optimised: starts, stages, levels, repair of folds, doubts."""
