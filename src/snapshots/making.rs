//! Making a local snapshot, for Prepare and View: first what takes time (questions, mounts, directories), on a thread that may block, then its record,
//! for which no thread waits. A container start passes here, and each change from one thread to another is a wait for a processor.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use super::SnapshotsError;
use super::chain::shown_by;
use super::core::{Core, Doubt};
use super::dirs::Built;
use super::info::now;
use super::limits;
use super::rules::{self, NewSnapshot, check_key, kept_labels};
use crate::layer::Digest;
use crate::proto::types::Mount;
use crate::store::{EXTRACTION, Kind};

/// A local snapshot that is wanted.
#[derive(Clone)]
pub(super) struct Wanted {
    pub kind: Kind,
    pub key: String,
    /// Empty for none.
    pub parent: String,
    pub labels: HashMap<String, String>,
    pub instead: Instead,
}

/// What is shown below a snapshot instead of what its ancestors show.
#[derive(Clone)]
pub(super) enum Instead {
    /// It is not known yet, and has to be asked where there is a doubt.
    Ask,
    /// Nobody is to be asked (any more): that, or what they show.
    Asked(Option<Vec<Option<Digest>>>),
}

/// What came of a wish for a local snapshot.
pub(super) enum Begun {
    /// It is made.
    Made(Box<Made>),
    /// Something has to be asked first.
    Doubtful(Doubt),
}

/// A local snapshot that is made and not recorded yet; dropped, it is nothing.
pub(super) struct Made {
    kind: Kind,
    key: String,
    parent: String,
    labels: BTreeMap<String, String>,
    own: Vec<Option<Digest>>,
    built: Built,
    lowers: Vec<PathBuf>,
    is_mapped: bool,
}

impl Core {
    /// Makes a local snapshot, for Prepare and View; [`Core::record`] is the rest.
    pub fn begin(&self, wanted: Wanted) -> Result<Begun, SnapshotsError> {
        let Wanted {
            kind,
            key,
            parent,
            labels,
            instead,
        } = wanted;
        check_key("key", &key)?;
        let instead = match instead {
            Instead::Ask => match self.doubt(&parent)? {
                Some(doubt) => return Ok(Begun::Doubtful(doubt)),
                None => None,
            },
            Instead::Asked(instead) => instead,
        };
        let labels = kept_labels(labels);
        let chain = self.parents(&parent)?;
        let mapping = self.mapping(&key, &labels, &chain)?;
        let size = limits::size(kind, &labels)?;
        let own = instead.unwrap_or_default();
        let shown = shown_by(&own, &chain);
        if !key.contains(EXTRACTION) {
            // A container: containerd unpacks nothing on it.
            self.expect_on(&chain, &shown);
            if kind == Kind::Active {
                self.start_on(&key, &chain, &shown);
            }
        }
        let lowers = self.lowers(&key, &chain, &shown)?;
        // What takes time is done before the transaction.
        let built = self.build(kind, &lowers, mapping.as_ref(), size)?;
        Ok(Begun::Made(Box::new(Made {
            kind,
            key,
            parent,
            labels,
            own,
            built,
            lowers,
            is_mapped: mapping.is_some(),
        })))
    }

    /// Records a snapshot that was made, and gives its id and its mounts. No thread waits for the disk meanwhile.
    pub async fn record(&self, made: Made) -> Result<(u64, Vec<Mount>), SnapshotsError> {
        let Made {
            kind,
            key,
            parent,
            labels,
            own,
            built,
            mut lowers,
            is_mapped,
        } = made;
        let dirs = Arc::clone(&self.dirs);
        let recorded = self.store.change_snapshots(move |snapshots| {
            let new = NewSnapshot {
                kind,
                key: &key,
                parent: &parent,
                labels,
                layer: None,
                chain: own,
                vouched: false,
            };
            let record = rules::create(snapshots, new, now())?;
            dirs.place(built, record.id)?;
            Ok::<_, SnapshotsError>(record)
        });
        let record = recorded.await?;
        if is_mapped {
            lowers = self.dirs.mapped(record.id, &lowers);
        }
        Ok((record.id, self.show(record.id, record.kind, &lowers)))
    }
}
