"""Score answers that are in files, whichever model wrote them; nothing here needs torch."""
