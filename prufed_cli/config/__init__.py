"""clients.yaml: what it may say, and what a person reads when it says something else."""

from prufed_cli.config.loading import load as load
from prufed_cli.config.messages import ConfigError as ConfigError
from prufed_cli.config.models import ClientConfig as ClientConfig
from prufed_cli.config.models import FederationConfig as FederationConfig
