"""The weights of replicas: kept equal to their homes', and moved when loads change."""
