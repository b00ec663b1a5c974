"""Steps of fits and of pretraining on real ranks, for the measurements that take them in turn."""
