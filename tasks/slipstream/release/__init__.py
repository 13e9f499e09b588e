"""The release protocol: ownership of a model's traffic (moves), completion or reversal after a crash (settle,
watchdog), and engines that may not be retried (rejections)."""
