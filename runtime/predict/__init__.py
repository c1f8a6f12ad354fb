"""Predictors: one image, or a batch of one size, to a mask with confidence and uncertainty."""
