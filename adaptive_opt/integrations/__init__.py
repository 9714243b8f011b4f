"""The thin glue that frameworks need; each file imports its own framework and nothing here imports them all."""
