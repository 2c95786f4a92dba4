"""The outside world: images, transforms, points and saved fits, read and written."""
