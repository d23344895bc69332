//! One scheduler for everything that is asked of sources: ranged requests, streams and tables of contents, over all layers and images.
//!
//! Its unit is a [`Wish`]: whose it is, how urgent, of what kind, and how much memory it takes while it runs. It grants *places*. Who holds a
//! [`Place`] may talk to the source; dropped, it goes to the next. [`policy`] decides, and is pure: no clock and no I/O, so that
//! `simulation` can try it in virtual time against hosts that hang, drip and throttle. [`driver`] wraps it for tokio, and [`turns`] bounds
//! what is decoded at once. How many ranged requests a host is asked at once follows its link: [`depth`] decides that, as pure as the policy is,
//! and [`depths`] brings the two together.
//!
//! # For those who ask
//! - [`Scheduler::enter`] waits for a place; [`Scheduler::ask`] gives a [`Ticket`], whose wish can be ranked anew while it waits
//!   ([`Remote::rank`]). Dropping either withdraws the wish.
//! - What has to be ranked by itself is a wish by itself: a learned prefetch is one of [`Class::Prefetch`], the completion of a layer a row of
//!   [`Class::Background`] wishes, each with its own deadline; parts of a stream that are fetched side by side are wishes of
//!   [`Kind::Part`] with the same owner, so that they share with nobody but their own repository.
//! - A place is ranked anew too: what somebody begins to wait for becomes demand and leaves room in its old class, what everybody has left
//!   sinks to background. Bytes under way are never thrown away for that.
//! - [`Place::contended`] tells that somebody else waits for places of this host: then take only what is really wanted.

pub mod depth;
pub mod depths;
pub mod driver;
pub mod policy;
#[cfg(test)]
mod simulation;
pub mod turns;

pub use depths::Traffic;
pub use driver::{HostLoad, Place, Remote, Scheduler, Ticket};
pub use policy::{Class, Kind, Limits, Policy, Wish};
pub use turns::Turns;
