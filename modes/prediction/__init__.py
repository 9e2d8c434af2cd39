"""What test, external_test and predict share: trained folds, encoding, predicting a slide."""
