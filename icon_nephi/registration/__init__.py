"""What a person asks for: register two images, and what the result can do."""
