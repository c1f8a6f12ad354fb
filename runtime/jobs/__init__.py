"""Jobs: running a predictor over a source so that no image is lost and none is done twice."""
