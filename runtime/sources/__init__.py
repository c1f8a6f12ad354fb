"""Where the images of a run come from: folders, lists, manifests, archives, here or behind a URL."""
