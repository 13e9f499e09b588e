"""The release protocol: who moves a model's traffic (moves), what is finished or put back after a crash
(settle, watchdog), and which engines may not be tried again (rejections)."""
