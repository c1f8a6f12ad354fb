"""Writers: the formats in which a run stores its results."""
