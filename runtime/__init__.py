"""The light side of multisa: bundles, backends, prediction and jobs; never imports torch."""
