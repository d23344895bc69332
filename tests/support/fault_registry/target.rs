//! What a request is about, by its path.

use http::Method;
use lazuli::layer::Digest;

use super::On;

pub(super) enum Target {
    Version,
    Manifest {
        repository: String,
        reference: String,
    },
    Blob {
        repository: String,
        digest: Option<Digest>,
    },
    Upload {
        repository: String,
        begun: bool,
    },
    Referrers {
        repository: String,
        subject: Option<Digest>,
    },
    Tags {
        repository: String,
    },
    Cdn {
        digest: Option<Digest>,
    },
    Token,
    Other,
}

impl Target {
    pub(super) fn parse(path: &str, is_cdn: bool) -> Self {
        if is_cdn {
            return Target::Cdn {
                digest: path.trim_start_matches('/').parse().ok(),
            };
        }
        match path {
            "/token" => return Target::Token,
            "/v2" | "/v2/" => return Target::Version,
            _ => {}
        }
        let Some(rest) = path.strip_prefix("/v2/") else {
            return Target::Other;
        };
        if let Some((repository, reference)) = rest.rsplit_once("/manifests/") {
            return Target::Manifest {
                repository: repository.to_owned(),
                reference: reference.to_owned(),
            };
        }
        if let Some((repository, place)) = rest.rsplit_once("/blobs/uploads/") {
            return Target::Upload {
                repository: repository.to_owned(),
                begun: !place.is_empty(),
            };
        }
        if let Some((repository, subject)) = rest.rsplit_once("/referrers/") {
            return Target::Referrers {
                repository: repository.to_owned(),
                subject: subject.parse().ok(),
            };
        }
        if let Some(repository) = rest.strip_suffix("/tags/list") {
            return Target::Tags {
                repository: repository.to_owned(),
            };
        }
        match rest.rsplit_once("/blobs/") {
            Some((repository, digest)) => Target::Blob {
                repository: repository.to_owned(),
                digest: digest.parse().ok(),
            },
            None => Target::Other,
        }
    }

    pub(super) fn on(&self, method: &Method) -> Option<On> {
        match self {
            Target::Manifest { .. } if matches!(*method, Method::PUT | Method::DELETE) => Some(On::Write),
            Target::Manifest { .. } => Some(On::Manifest),
            Target::Upload { .. } => Some(On::Upload),
            Target::Referrers { .. } => Some(On::Referrers),
            Target::Blob { .. } => Some(On::Blob),
            Target::Cdn { .. } => Some(On::Cdn),
            Target::Token => Some(On::Token),
            Target::Version | Target::Tags { .. } | Target::Other => None,
        }
    }

    pub(super) fn needs_auth(&self) -> bool {
        !matches!(self, Target::Cdn { .. } | Target::Token | Target::Other)
    }

    pub(super) fn repository(&self) -> &str {
        match self {
            Target::Manifest { repository, .. }
            | Target::Blob { repository, .. }
            | Target::Upload { repository, .. }
            | Target::Referrers { repository, .. }
            | Target::Tags { repository } => repository,
            _ => "",
        }
    }
}
