"""Predictors turn an image, or a batch of one size, into masks with confidence and uncertainty."""
