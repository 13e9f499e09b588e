"""The report of a pipeline run: collected once as a document, then drawn as page, plots and terminal table."""
