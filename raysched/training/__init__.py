"""The training loop; knows neither Ray nor MLflow."""
