"""Make new samples from accepted ones: operators, and a run of requests about their parents."""
