"""The shared engine: scheduler, KV block manager, models, runner, sampler and text."""
