from hypothesis import settings

settings.register_profile("repeatable", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("repeatable")
