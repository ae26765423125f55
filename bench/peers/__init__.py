"""The peers' environments: exact pins beside this file, installed on request only, one folder each."""
