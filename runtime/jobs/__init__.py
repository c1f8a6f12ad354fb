"""Jobs: running a predictor over a corpus so that no image is lost and none is done twice."""
