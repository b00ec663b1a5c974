"""Steps of fits and pretraining runs on real ranks, driven by the benchmarks."""
