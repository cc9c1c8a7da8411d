"""Whether a model got worse: exact checks and paired tests of a candidate beside a baseline, by the rules of a gate file."""
