//! The snapshotter against a model of it: random requests, and after each the same answer, the same list, and exactly
//! the directories that the list needs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use proptest::prelude::*;
use tonic::Code;

use super::core::{Core, Outcome, Resolved};
use super::handover::Handover;
use super::making::{Begun, Instead, Wanted};
use super::rules::{REF_LABEL, remote_name};
use crate::catalog::loader::Refusal;
use crate::catalog::{
    Agreement, Application, Applied, LayerRequest, Layers, Lowers, Needed, Question, Released, Resolution,
};
use crate::layer::Digest;
use crate::metrics::Metrics;
use crate::proto::snapshots::v1::{Info, Kind as ApiKind};
use crate::store::{Kind, Store};
use crate::sync::wait;

/// Every layer is live, and shown by one directory.
struct OneDirectory(PathBuf);

impl Layers for OneDirectory {
    fn resolve(&self, request: LayerRequest) -> BoxFuture<'_, Resolution> {
        async move {
            Resolution::Live {
                layer: Digest::of(request.chain_id.as_bytes()),
                below: request.below.iter().map(|_| None).collect(),
                proven: true,
                is_top: true,
            }
        }
        .boxed()
    }

    fn apply(&self, application: Application) -> BoxFuture<'_, Result<Applied, Refusal>> {
        let tar = Digest::of(application.chain_id.as_bytes());
        async move {
            Ok(Applied {
                layer: tar,
                tar,
                tar_size: 0,
                proven: true,
                is_top: true,
            })
        }
        .boxed()
    }

    fn agree(&self, _: Question) -> BoxFuture<'_, Agreement> {
        async { Agreement::Shown }.boxed()
    }

    fn is_live(&self, _: &Digest) -> bool {
        true
    }

    fn lowers(&self, layers: &[Digest], merged: bool) -> Result<Lowers, Digest> {
        Ok(match layers.len() % 2 {
            0 if merged => Lowers::Segments(vec![(0, self.0.clone())]),
            _ => Lowers::Stacked(vec![self.0.clone(); layers.len()]),
        })
    }

    fn expect(&self, _: &[Digest]) {}

    fn usage(&self, _: &Digest) -> Option<(u64, u64)> {
        None
    }

    fn mark(&self) -> u64 {
        0
    }

    fn no_mapped_owners(&self) -> Option<String> {
        None
    }

    fn retain(&self, _: Needed, _: u64) -> BoxFuture<'_, Released> {
        async { Box::new(|| ()) as Released }.boxed()
    }
}

#[derive(Debug, Clone)]
enum Request {
    Create(Kind, String, String, Labels),
    Commit(String, String, String, Labels),
    Publish(String, String),
    Remove(String),
    Update(String, Labels, Vec<String>),
    Mounts(String),
    Restart,
}

type Labels = HashMap<String, String>;

#[derive(Debug, Clone, PartialEq)]
struct Model {
    kind: Kind,
    parent: String,
    labels: BTreeMap<String, String>,
}

/// What the snapshotter should do, in as few words as possible.
#[derive(Default)]
struct Models(BTreeMap<String, Model>);

impl Models {
    fn apply(&mut self, request: &Request) -> Result<(), Code> {
        match request {
            Request::Create(kind, key, parent, labels) => {
                self.parent(parent)?;
                self.absent(key)?;
                self.insert(key, *kind, parent, labels);
            }
            Request::Publish(parent, chain_id) => {
                self.parent(parent)?;
                let name = remote_name(parent, chain_id);
                let labels = [(REF_LABEL.to_owned(), chain_id.clone())].into();
                match self.0.get_mut(&name) {
                    Some(present) => drop(present.labels.insert(REF_LABEL.to_owned(), chain_id.clone())),
                    None => self.insert(&name, Kind::Committed, parent, &labels),
                }
            }
            Request::Commit(name, key, parent, labels) => {
                let active = self.0.get(key).ok_or(Code::NotFound)?.clone();
                if active.kind != Kind::Active || !(parent.is_empty() || *parent == active.parent) {
                    return Err(Code::FailedPrecondition);
                }
                self.absent(name)?;
                self.0.remove(key);
                self.insert(name, Kind::Committed, &active.parent, labels);
            }
            Request::Remove(key) => {
                if self.0.values().any(|model| model.parent == *key) {
                    return Err(Code::FailedPrecondition);
                }
                self.0.remove(key).ok_or(Code::NotFound)?;
            }
            Request::Update(key, labels, paths) => {
                let model = self.0.get_mut(key).ok_or(Code::NotFound)?;
                if paths.iter().any(|path| !path.starts_with("labels")) {
                    return Err(Code::InvalidArgument);
                }
                match paths.first().map(String::as_str) {
                    None | Some("labels") => model.labels = kept(labels),
                    Some(path) => {
                        let label = path.trim_start_matches("labels.");
                        model.labels.remove(label);
                        model.labels.extend(kept(labels).remove_entry(label));
                    }
                }
            }
            Request::Mounts(key) => {
                if self.0.get(key).ok_or(Code::NotFound)?.kind == Kind::Committed {
                    return Err(Code::FailedPrecondition);
                }
            }
            Request::Restart => {}
        }
        Ok(())
    }

    fn parent(&self, parent: &str) -> Result<(), Code> {
        match self.0.get(parent) {
            _ if parent.is_empty() => Ok(()),
            None => Err(Code::NotFound),
            Some(model) if model.kind != Kind::Committed => Err(Code::InvalidArgument),
            Some(_) => Ok(()),
        }
    }

    fn absent(&self, key: &str) -> Result<(), Code> {
        match self.0.contains_key(key) {
            true => Err(Code::AlreadyExists),
            false => Ok(()),
        }
    }

    fn insert(&mut self, key: &str, kind: Kind, parent: &str, labels: &Labels) {
        let model = Model {
            kind,
            parent: parent.to_owned(),
            labels: kept(labels),
        };
        self.0.insert(key.to_owned(), model);
    }
}

fn kept(labels: &Labels) -> BTreeMap<String, String> {
    let kept = labels.iter().filter(|(_, value)| !value.is_empty());
    kept.map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn model_of(info: Info) -> (String, Model) {
    let kind = match info.kind() {
        ApiKind::View => Kind::View,
        ApiKind::Active => Kind::Active,
        _ => Kind::Committed,
    };
    let model = Model {
        kind,
        parent: info.parent,
        labels: info.labels.into_iter().collect(),
    };
    (info.name, model)
}

/// The real thing.
struct Real {
    core: Option<Core>,
    dir: tempfile::TempDir,
}

impl Real {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("layer")).unwrap();
        let mut real = Real { core: None, dir };
        real.restart();
        real
    }

    fn restart(&mut self) {
        self.core = None;
        let root = self.dir.path().join("root");
        std::fs::create_dir_all(&root).unwrap();
        let store = Arc::new(Store::open(&root.join("metadata.redb")).unwrap());
        let layers = Arc::new(OneDirectory(self.dir.path().join("layer")));
        self.core = Some(Core::open(&root, store, layers, &Arc::new(Metrics::new())).unwrap());
    }

    fn core(&self) -> &Core {
        self.core.as_ref().unwrap()
    }

    fn apply(&mut self, request: &Request) -> Result<(), Code> {
        let result = match request.clone() {
            Request::Create(kind, key, parent, labels) => {
                let wanted = Wanted {
                    kind,
                    key,
                    parent,
                    labels,
                    instead: Instead::Asked(None),
                };
                self.core().begin(wanted).and_then(|begun| match begun {
                    Begun::Made(made) => wait(self.core().record(*made)).map(drop),
                    Begun::Doubtful(_) => unreachable!("nobody is to be asked"),
                })
            }
            Request::Publish(parent, chain_id) => {
                let resolved = Resolved {
                    layer: Digest::of(chain_id.as_bytes()),
                    below: Vec::new(),
                    proven: true,
                };
                let published = self.core().publish(&parent, &chain_id, HashMap::new(), resolved);
                let expected = remote_name(&parent, &chain_id);
                published.map(|outcome| assert!(matches!(outcome, Outcome::Named(name) if name == expected)))
            }
            Request::Commit(name, key, parent, labels) => self.core().commit(&name, &key, &parent, labels),
            Request::Remove(key) => {
                let removed = crate::sync::wait(self.core().remove_record(&key));
                removed.map(|record| {
                    self.core().discard(&key, &record);
                })
            }
            Request::Update(key, labels, paths) => self.core().update(&key, labels, &paths).map(drop),
            Request::Mounts(key) => self.core().mounts(&key).map(drop),
            Request::Restart => {
                self.restart();
                Ok(())
            }
        };
        result.map_err(|error| error.code())
    }

    fn list(&self) -> BTreeMap<String, Model> {
        self.core()
            .list(&[], &Handover::default())
            .unwrap()
            .into_iter()
            .map(model_of)
            .collect()
    }

    /// Number of directories of snapshots.
    fn directories(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("root/snapshots"))
            .unwrap()
            .count()
    }
}

/// Few names, so that requests meet.
fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => prop::sample::select(vec!["a", "ns/1/b c", "c", "d"]).prop_map(str::to_owned),
        1 => (parent_key(), chain_id()).prop_map(|(parent, chain_id)| remote_name(&parent, &chain_id)),
    ]
}

fn parent_key() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "a", "c"]).prop_map(str::to_owned)
}

fn parent() -> impl Strategy<Value = String> {
    prop_oneof![2 => Just(String::new()), 3 => key()]
}

fn chain_id() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["sha256:1", "sha256:2"]).prop_map(str::to_owned)
}

fn labels() -> impl Strategy<Value = Labels> {
    let keys = prop::sample::select(vec!["l1", "l2", "a.b"]);
    let values = prop::sample::select(vec!["", "x", "y"]);
    prop::collection::hash_map(keys.prop_map(str::to_owned), values.prop_map(str::to_owned), 0..3)
}

fn request() -> impl Strategy<Value = Request> {
    let kind = prop::sample::select(vec![Kind::Active, Kind::Active, Kind::View]);
    let paths = prop::sample::select(vec![
        vec![],
        vec!["labels"],
        vec!["labels.l1"],
        vec!["labels.a.b"],
        vec!["kind"],
    ]);
    let paths = paths.prop_map(|paths| paths.into_iter().map(str::to_owned).collect());
    let commit_parent = prop_oneof![4 => Just(String::new()), 1 => parent()];
    prop_oneof![
        6 => (kind, key(), parent(), labels()).prop_map(|(kind, key, parent, labels)| {
            Request::Create(kind, key, parent, labels)
        }),
        6 => (key(), key(), commit_parent, labels()).prop_map(|(name, key, parent, labels)| {
            Request::Commit(name, key, parent, labels)
        }),
        3 => (parent(), chain_id()).prop_map(|(parent, chain_id)| Request::Publish(parent, chain_id)),
        4 => key().prop_map(Request::Remove),
        2 => (key(), labels(), paths).prop_map(|(key, labels, paths)| Request::Update(key, labels, paths)),
        1 => key().prop_map(Request::Mounts),
        1 => Just(Request::Restart),
    ]
}

proptest! {
    // Each request waits for the disk.
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn it_does_what_the_model_does(requests in prop::collection::vec(request(), 1..50)) {
        let mut real = Real::new();
        let mut models = Models::default();
        for request in &requests {
            // Names of remote snapshots are Lazuli's own: containerd's keys never look like them.
            if let Request::Create(_, key, ..) | Request::Commit(key, ..) = request
                && key.starts_with("lazuli/")
            {
                continue;
            }
            prop_assert_eq!(real.apply(request), models.apply(request), "{:?}", request);
            prop_assert_eq!(&real.list(), &models.0, "after {:?}", request);
        }
        prop_assert_eq!(real.directories(), models.0.len());
        // Children first, as containerd collects garbage.
        while !models.0.is_empty() {
            let parents: BTreeSet<_> = models.0.values().map(|model| model.parent.clone()).collect();
            let leaf = models.0.keys().find(|key| !parents.contains(*key)).unwrap().clone();
            prop_assert_eq!(real.apply(&Request::Remove(leaf.clone())), Ok(()));
            models.0.remove(&leaf);
        }
        prop_assert_eq!(real.directories(), 0);
    }
}
