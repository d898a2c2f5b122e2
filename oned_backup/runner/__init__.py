"""Find drivers, run one action of one, and judge a driver by the conformance kit."""
