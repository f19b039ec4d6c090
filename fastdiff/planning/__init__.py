"""From a budget to a plan: measure a model here, search, prove the choice on prompts the search has not seen."""
