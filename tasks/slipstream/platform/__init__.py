"""The embedded platform: Airflow, MLflow, Envoy and the model servers on one machine, under supervisord."""
