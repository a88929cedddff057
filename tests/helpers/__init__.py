"""What several tests share: tiny models, processes to start, drawings by other programs, exercises solved by hand."""
