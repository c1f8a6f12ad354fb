"""The light side of multisa: bundles, engines, labelling and segmenting in bulk; never imports torch."""
