"""How fast HiFusion is, beside the published recipe and beside what the processor can do (`make bench`)."""
