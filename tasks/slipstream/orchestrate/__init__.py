"""What starts and follows runs from outside: triggers, the display of `run --watch`, the Kubeflow compiler."""
