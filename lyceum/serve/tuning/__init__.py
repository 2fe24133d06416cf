"""Fine-tuning jobs: asked for over the API, run by the command line beside the server, answered by it when they are done."""
