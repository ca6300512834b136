"""What the commands share: flags and settings, what they read, what they write, training, pictures."""
