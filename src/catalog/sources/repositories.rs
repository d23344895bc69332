//! Where documents about layers are read from.

use std::sync::Arc;

use super::origin;
use crate::fetch::Fetcher;
use crate::fetch::schedule::Class;
use crate::registry::{Reference, Registry, Source};
use crate::store::LayerSource;

/// The repositories that documents about layers are read from. In a daemon they are read when the scheduler lets it, as all else is.
#[derive(Clone)]
pub struct Repositories {
    registry: Arc<Registry>,
    fetcher: Option<Arc<Fetcher>>,
}

impl From<Arc<Registry>> for Repositories {
    /// For who reads nothing else meanwhile.
    fn from(registry: Arc<Registry>) -> Self {
        let fetcher = None;
        Repositories { registry, fetcher }
    }
}

impl Repositories {
    /// Those of `registry`, read when the scheduler of `fetcher` lets it.
    pub fn scheduled(registry: Arc<Registry>, fetcher: Arc<Fetcher>) -> Self {
        let fetcher = Some(fetcher);
        Repositories { registry, fetcher }
    }

    /// That of an image. Cheap; nothing is asked yet.
    pub fn of(&self, image: &Reference) -> Arc<dyn Source> {
        self.at(&LayerSource {
            host: image.host.clone(),
            repository: image.repository.clone(),
        })
    }

    /// One of them. Cheap; nothing is asked yet.
    pub fn at(&self, place: &LayerSource) -> Arc<dyn Source> {
        let source = self.registry.repository(&place.host, &place.repository);
        match &self.fetcher {
            Some(fetcher) => fetcher.scheduled_source(source, origin(place), Class::Demand),
            None => source,
        }
    }
}
