"""Speed and memory of models over image sizes: what is measured, each case in its own process, what the numbers say."""
