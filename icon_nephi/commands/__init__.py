"""What a terminal asks for: flags, and what each command does with them."""
