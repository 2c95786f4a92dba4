"""How exact registrations are, ours and those of others."""
