"""From images to caches: slides ahead, the patch encoder, writers."""
