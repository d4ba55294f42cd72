"""Looking at records: what becomes of each, its tokens, statistics, and a page of it all."""
