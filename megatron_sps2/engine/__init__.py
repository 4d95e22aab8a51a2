"""Floor 4: requests in, tokens out; schedules, runs and samples."""
