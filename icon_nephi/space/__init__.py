"""Where things are, and how values are read: frames, images, intensities, samples."""
