//! The connection of all ranks to rank 0, from the meeting to the end.
//!
//! Each rank has one background thread for each of its connections, which are W - 1 on rank 0 and one on every other
//! rank. It reads, gives a sign of life every second, and notices when the other side is closed or silent. A rank's own
//! thread never has to answer for its rank to count as alive, nor for all to agree where to stop.
//!
//! **Failure.** The first failure that rank 0 hears of is everybody's: it is passed on, and every wait of every rank
//! ends with the same sentence. A process that does not end then, because it hangs in a driver, is ended by its
//! background thread after [`Timeouts::grace`].
//!
//! **Stopping.** Ranks do not run in step: on a GPU a host is many steps ahead of its device, and ranks are ahead of
//! each other. So rank 0 asks all which step they have begun, they begin no other before they have its answer, and it
//! answers with the last of these. All ranks do the steps up to it, and no rank any other.
//!
//! **Writing.** Any thread may write, a whole message at a time. A background thread never waits for its rank's thread:
//! where that one is writing, bytes flow, and a sign of life is not needed.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

use super::join::{self, Joining, Link};
use super::message::{Call, Decoder, Fact, LONGEST_BODY, Message, Stop, Who, head};
use super::{Patience, Timeouts, in_words};

/// Ends this process, saying why; for one that hangs. It must not return.
pub type LastResort = Box<dyn Fn(&str) + Send + Sync>;

/// Between two looks of a thread that waits for something that does not wake it.
const TICK: Duration = Duration::from_millis(200);
/// For the other side to take last words and to close its side.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a rank lives on that ends because of another one, so that whoever looks at the processes sees that one end
/// first.
const HINDSIGHT: Duration = Duration::from_millis(300);
/// The longest that one announcement stretches the waits of others.
const LONGEST_WORK: Duration = Duration::from_secs(86_400);
/// Characters of what a rank says for people.
const LONGEST_WORDS: usize = 2000;

/// The connection of this rank to the others. See the text above.
pub struct Control {
    shared: Arc<Shared>,
    machines: Vec<Range<usize>>,
    threads: Vec<JoinHandle<()>>,
    calls: AtomicU64,
}

struct Shared {
    me: usize,
    ranks: Vec<Who>,
    /// In the order of the ranks: of rank 0 to all others, of the others to rank 0.
    wires: Vec<Wire>,
    timeouts: Timeouts,
    state: Mutex<State>,
    changed: Condvar,
    /// As in the state, for looks that must cost nothing.
    failed: Arc<AtomicBool>,
    cancelled: Arc<AtomicBool>,
    last_resort: Option<LastResort>,
}

/// The side of a connection that is written to.
struct Wire {
    rank: usize,
    writer: Mutex<TcpStream>,
    /// The same, to be shut down while somebody writes.
    stream: TcpStream,
}

#[derive(Default)]
struct State {
    /// What every wait ends with.
    failure: Option<String>,
    /// The rank because of which.
    culprit: Option<usize>,
    /// The others are being told of it, so that the connections must stay.
    telling: bool,
    /// By rank: parts of common tasks on rank 0, answers on the others.
    inbox: Vec<VecDeque<(Call, Vec<u8>)>>,
    /// By rank: the step it is at, as far as it is known here.
    steps: Vec<u32>,
    stopping: Stopping,
    /// By rank: what it does alone, and until when it may take.
    working: Vec<Option<(String, Instant)>>,
    /// By rank, on rank 0: it has done all its work.
    left: Vec<bool>,
    /// All have done their work.
    goodbye: bool,
    /// This rank ends.
    closing: bool,
}

#[derive(Default)]
enum Stopping {
    #[default]
    No,
    /// This rank has asked.
    Asked,
    /// This rank begins no further step until it is told. On rank 0: why, and the steps that were begun, by rank.
    Held(Option<(Stop, Vec<Option<u32>>)>),
    At(Stop),
}

impl Control {
    /// Meets the other ranks. Returns also sentences for the user.
    ///
    /// # Errors
    /// `Error::Failed` if not all come in time, or differ; the sentence is the same on every rank. `Error::Usage` for a
    /// meeting point that is open to the network without a secret. `Error::Interrupted` once it is cancelled.
    ///
    /// # Panics
    /// For facts of more than a megabyte.
    pub fn join(mut joining: Joining) -> Result<(Self, Vec<String>)> {
        let met = join::meet(&mut joining)?;
        let Joining { world, timeouts, cancelled, last_resort, .. } = joining;
        let machines = join::machines(&met.ranks)?;
        let failed = |e: io::Error| Error::Failed(format!("the connection to another rank: {e}"));
        let mut wires = Vec::new();
        let mut readers = Vec::new();
        for Link { rank, stream, decoder } in met.links {
            stream.set_nodelay(true).map_err(failed)?;
            stream.set_read_timeout(Some(TICK.min(timeouts.beat()))).map_err(failed)?;
            stream.set_write_timeout(Some(timeouts.silence)).map_err(failed)?;
            let writer = Mutex::new(stream.try_clone().map_err(failed)?);
            wires.push(Wire { rank, writer, stream: stream.try_clone().map_err(failed)? });
            readers.push((stream, decoder));
        }
        let state = State {
            inbox: met.ranks.iter().map(|_| VecDeque::new()).collect(),
            steps: vec![0; met.ranks.len()],
            working: vec![None; met.ranks.len()],
            left: vec![false; met.ranks.len()],
            ..State::default()
        };
        let shared = Arc::new(Shared {
            me: world.rank,
            ranks: met.ranks,
            wires,
            timeouts,
            state: Mutex::new(state),
            changed: Condvar::new(),
            failed: Arc::new(AtomicBool::new(false)),
            cancelled,
            last_resort,
        });
        let mut control = Control { shared, machines, threads: Vec::new(), calls: AtomicU64::new(0) };
        for (place, (stream, decoder)) in readers.into_iter().enumerate() {
            let shared = control.shared.clone();
            let rank = shared.wires[place].rank;
            let follow = move || Reader::new(&shared, place, stream, decoder).run();
            let thread = thread::Builder::new().name(format!("rank {rank}")).spawn(follow);
            control.threads.push(thread.map_err(failed)?);
        }
        Ok((control, met.notes))
    }

    /// The number of this rank.
    pub fn rank(&self) -> usize {
        self.shared.me
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.shared.ranks.len()
    }

    /// All ranks, in order.
    pub fn ranks(&self) -> &[Who] {
        &self.shared.ranks
    }

    /// The ranks of each machine, which follow each other.
    pub fn machines(&self) -> &[Range<usize>] {
        &self.machines
    }

    /// Whether all goes well. Costs two loads, so that every loop that waits can ask.
    ///
    /// # Errors
    /// `Error::Failed` with the sentence that every rank ends with; `Error::Interrupted` once this rank is cancelled.
    pub fn check(&self) -> Result<()> {
        self.shared.check()
    }

    /// True from the moment on at which [`check`](Self::check) says that the run has failed, for threads that end other
    /// waits then.
    pub fn failed(&self) -> Arc<AtomicBool> {
        self.shared.failed.clone()
    }

    /// A wait for `what`, such as `the exchange of gradients`, with a deadline: while the work is not done, call
    /// [`Wait::poll`] every now and then.
    pub fn wait(&self, what: impl Into<String>) -> Wait<'_> {
        self.shared.wait(what.into(), None)
    }

    /// Says that this rank now does something alone for at most so long, such as saving a checkpoint: until then, or
    /// until the value is dropped, nobody's wait comes to its end.
    pub fn announce(&self, what: &str, most: Duration) -> Announced<'_> {
        let millis = most.min(LONGEST_WORK).as_millis().max(1) as u64;
        self.shared.announce(self.shared.me, what, millis);
        Announced { shared: &self.shared }
    }

    /// Asks all ranks to stop, with the same exit code, as soon as they can. Only the first rank that asks is heard.
    pub fn ask_to_stop(&self, code: u8, why: &str) {
        self.shared.ask_to_stop(code, why);
    }

    /// Whether a stop was asked for, as far as this rank knows. What it breaks off for that reason it must not leave
    /// the others waiting in.
    pub fn is_stopping(&self) -> bool {
        !matches!(self.shared.lock().stopping, Stopping::No)
    }

    /// Where and why the run stops before its end, once that is decided.
    pub fn stopped(&self) -> Option<Stop> {
        match &self.shared.lock().stopping {
            Stopping::At(stop) => Some(stop.clone()),
            Stopping::No | Stopping::Asked | Stopping::Held(_) => None,
        }
    }

    /// To be called before each step, with its number, which is greater than the last one: `None` to do it, or where
    /// the run has stopped.
    ///
    /// # Errors
    /// Those of [`check`](Self::check).
    pub fn next(&self, step: u32) -> Result<Option<Stop>> {
        self.shared.next(step)
    }

    /// Waits until all ranks have come here. `name` says what for, and must be the same on all of them.
    ///
    /// # Errors
    /// Those of [`check`](Self::check); a rank that has not come within [`Timeouts::wait`], or that has come to another
    /// task.
    pub fn barrier(&self, name: &str) -> Result<()> {
        let call = self.call("barrier", name);
        self.parts(&call, &[])?;
        self.answer(&call, &[]).map(drop)
    }

    /// Brings the bytes of all ranks to rank 0, which gets them in order, its own first; the others get `None` and do
    /// not wait.
    ///
    /// # Errors
    /// As for [`barrier`](Self::barrier); bytes that are more than [`LONGEST_BODY`].
    pub fn gather(&self, name: &str, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        let call = self.call("gather", name);
        self.parts(&call, bytes)
    }

    /// Brings the bytes of rank 0 to all ranks. Those that the others give are ignored.
    ///
    /// # Errors
    /// As for [`gather`](Self::gather).
    pub fn broadcast(&self, name: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let call = self.call("broadcast", name);
        self.answer(&call, bytes)
    }

    /// Compares facts that were not known at the meeting, such as the hash of the data.
    ///
    /// # Errors
    /// `Error::Failed` that names the first difference and both sides, the same on every rank; those of
    /// [`barrier`](Self::barrier).
    pub fn agree(&self, name: &str, facts: &[Fact]) -> Result<()> {
        let call = self.call("agreement", name);
        let bytes = serde_json::to_vec(facts).expect("texts");
        let ranks = self.ranks();
        let differs = |(who, theirs): (&Who, &Vec<u8>)| {
            let theirs: Vec<Fact> = serde_json::from_slice(theirs).unwrap_or_default();
            join::difference((&ranks[0], facts), (who, &theirs))
        };
        let all = self.parts(&call, &bytes)?.unwrap_or_default();
        let verdict = ranks.iter().zip(&all).skip(1).find_map(differs).unwrap_or_default();
        let verdict = self.answer(&call, verdict.as_bytes())?;
        match verdict.is_empty() {
            true => Ok(()),
            false => Err(Error::Failed(String::from_utf8_lossy(&verdict).into_owned())),
        }
    }

    /// The last call of a rank that has done all its work, rank 0 its last file: waits until all have. Dropping this
    /// closes the connections.
    ///
    /// # Errors
    /// Those of [`check`](Self::check): the run has failed after all.
    pub fn leave(&self) -> Result<()> {
        let left = self.shared.leave();
        if let Err(e) = &left {
            self.shared.fail_myself(&e.to_string());
        }
        left
    }

    /// The last call of a rank that has failed: tells the others why, in a sentence. Without effect once all have left.
    pub fn fail(&self, words: &str) {
        self.shared.fail_myself(words);
    }

    fn call(&self, kind: &str, name: &str) -> Call {
        Call { number: self.calls.fetch_add(1, Ordering::Relaxed), name: format!("{kind} of {name}") }
    }

    /// A part of each rank to rank 0.
    fn parts(&self, call: &Call, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        let shared = &*self.shared;
        check_length(bytes)?;
        shared.check()?;
        if shared.me > 0 {
            shared.send(&shared.wires[0], &Message::Part(call.clone()), bytes);
            return Ok(None);
        }
        let mut all = vec![bytes.to_vec()];
        for rank in 1..shared.ranks.len() {
            all.push(shared.receive(rank, call)?);
        }
        Ok(Some(all))
    }

    /// Rank 0's bytes to all.
    fn answer(&self, call: &Call, bytes: &[u8]) -> Result<Vec<u8>> {
        let shared = &*self.shared;
        if shared.me > 0 {
            return shared.receive(0, call);
        }
        check_length(bytes)?;
        for wire in &shared.wires {
            shared.check()?;
            shared.send(wire, &Message::Answer(call.clone()), bytes);
        }
        Ok(bytes.to_vec())
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Nothing, if the run has failed already or all have left.
        self.shared.fail_myself(if thread::panicking() { "panicked, a fault of the program" } else { "ended early" });
        self.shared.close();
        for thread in self.threads.drain(..) {
            // A panic of a background thread has been printed.
            let _ = thread.join();
        }
        if self.shared.lock().culprit.is_some_and(|rank| rank != self.shared.me) {
            thread::sleep(HINDSIGHT);
        }
    }
}

fn check_length(bytes: &[u8]) -> Result<()> {
    match bytes.len() > LONGEST_BODY {
        true => Err(Error::Failed(format!("{} bytes for another rank; {LONGEST_BODY} are the most", bytes.len()))),
        false => Ok(()),
    }
}

/// Work that a rank does alone; until it is dropped, or takes longer than it was to, nobody's wait ends.
pub struct Announced<'a> {
    shared: &'a Shared,
}

impl Drop for Announced<'_> {
    fn drop(&mut self) {
        self.shared.announce(self.shared.me, "", 0);
    }
}

/// A wait with a deadline.
pub struct Wait<'a> {
    shared: &'a Shared,
    what: String,
    /// The rank that is waited for, if it is one.
    whom: Option<usize>,
    most: Duration,
    patience: Patience,
    looked: Instant,
}

impl Wait<'_> {
    /// Whether to wait on. Cheap, and it does not sleep.
    ///
    /// # Errors
    /// Those of [`Control::check`]; a wait longer than [`Timeouts::wait`], not counting work that was announced.
    pub fn poll(&mut self) -> Result<()> {
        self.shared.check()?;
        if self.looked.elapsed() < TICK {
            return Ok(());
        }
        self.looked = Instant::now();
        let state = self.shared.lock();
        let result = self.look(&state);
        drop(state);
        result
    }

    fn look(&mut self, state: &State) -> Result<()> {
        let now = Instant::now();
        if state.working.iter().flatten().any(|(_, until)| *until > now) {
            self.patience.begin_again();
        }
        if self.patience.passed() <= self.most {
            return Ok(());
        }
        let ranks = &self.shared.ranks;
        let overdue = state.working.iter().zip(ranks).find_map(|(work, who)| Some((who, &work.as_ref()?.0)));
        let waited = in_words(self.most);
        Err(Error::Failed(match (overdue, self.whom) {
            (Some((who, what)), _) => format!("{who} takes longer than it has announced for {what}"),
            (None, Some(whom)) => {
                let step = last_known(state.steps[whom]);
                format!("{} has not come to the {} within {waited}{step}", ranks[whom], self.what)
            }
            (None, None) => {
                let steps: Vec<String> = state.steps.iter().map(u32::to_string).collect();
                let steps = crate::text::cut(&steps.join(", "));
                format!("{} has not ended within {waited}; the last known steps of the ranks are {steps}", self.what)
            }
        }))
    }
}

/// Words for people that fit into a message.
fn short(words: &str) -> String {
    words.chars().take(LONGEST_WORDS).collect()
}

/// Where another rank is in its training, the end of a sentence; its signs of life say it, a second late.
fn last_known(step: u32) -> String {
    match step {
        0 => String::new(),
        step => format!("; its last known step is {step}"),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing is left half done where a thread could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change, but not long.
    fn sleep<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0
    }

    fn check(&self) -> Result<()> {
        if self.failed.load(Ordering::Acquire) {
            let failure = self.lock().failure.clone();
            return Err(Error::Failed(failure.unwrap_or_default()));
        }
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    fn wait(&self, what: String, whom: Option<usize>) -> Wait<'_> {
        // Rank 0 knows best who is late, so the others give it time to say so.
        let most = if self.me == 0 { self.timeouts.wait } else { self.timeouts.wait * 5 / 4 };
        let (patience, looked) = (Patience::new(), Instant::now());
        Wait { shared: self, what, whom, most, patience, looked }
    }

    /// Waits until `done` gives something. What has come counts, although the run may have failed behind it: so all
    /// ranks that ended a task together have its outcome.
    fn until<T>(&self, what: &str, whom: Option<usize>, mut done: impl FnMut(&mut State) -> Option<T>) -> Result<T> {
        let mut wait = self.wait(what.to_string(), whom);
        let mut state = self.lock();
        loop {
            if let Some(result) = done(&mut state) {
                return Ok(result);
            }
            if state.failure.is_some() || self.cancelled.load(Ordering::Relaxed) {
                drop(state);
                return self.check().and_then(|()| Err(Error::Interrupted));
            }
            wait.look(&state)?;
            state = self.sleep(state);
        }
    }

    /// The part or the answer of a rank.
    fn receive(&self, from: usize, call: &Call) -> Result<Vec<u8>> {
        let (other, bytes) = self.until(&call.name, Some(from), |state| state.inbox[from].pop_front())?;
        if other != *call {
            let (first, second) = (&self.ranks[self.me], &self.ranks[from]);
            return Err(Error::Failed(format!(
                "{first} is at its task {}, the {}, and {second} at its task {}, the {}: the ranks do not do the same",
                call.number, call.name, other.number, other.name
            )));
        }
        Ok(bytes)
    }

    /// Writes a message. What prevents it is a failure, which the thread that reads the connection finds: the other
    /// side may have said why before it closed.
    fn send(&self, wire: &Wire, message: &Message, body: &[u8]) {
        let mut writer = wire.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let written = writer.write_all(&head(message, body.len())).and_then(|()| writer.write_all(body));
        drop(writer);
        self.written(wire, written);
    }

    fn written(&self, wire: &Wire, written: io::Result<()>) {
        if let Err(e) = written
            && matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
        {
            let silence = in_words(self.timeouts.silence);
            self.lose(wire.rank, &format!("has taken nothing in for {silence}"));
        }
    }

    /// A sign of life, if nobody is writing.
    fn beat(&self, wire: &Wire) {
        let step = self.lock().steps[self.me];
        if let Ok(mut writer) = wire.writer.try_lock() {
            let written = writer.write_all(&head(&Message::Alive { step }, 0));
            drop(writer);
            self.written(wire, written);
        }
    }

    fn announce(&self, rank: usize, what: &str, millis: u64) {
        let until = Instant::now() + Duration::from_millis(millis).min(LONGEST_WORK);
        let what = short(what);
        self.lock().working[rank] = (millis > 0).then(|| (what.clone(), until));
        self.changed.notify_all();
        if self.failed.load(Ordering::Acquire) {
            return;
        }
        for wire in self.wires.iter().filter(|wire| wire.rank != rank) {
            self.send(wire, &Message::Working { rank, what: what.clone(), millis }, &[]);
        }
    }

    fn ask_to_stop(&self, code: u8, why: &str) {
        let why = short(why);
        if self.me == 0 {
            return self.hold_all(Stop { after: 0, code, why, rank: 0 });
        }
        let mut state = self.lock();
        if let Stopping::No = state.stopping {
            state.stopping = Stopping::Asked;
            drop(state);
            self.send(&self.wires[0], &Message::Ask { code, why }, &[]);
        }
    }

    /// On rank 0: asks all where they are, unless it has.
    fn hold_all(&self, stop: Stop) {
        let mut state = self.lock();
        if !matches!(state.stopping, Stopping::No) {
            return;
        }
        let mut begun = vec![None; self.ranks.len()];
        begun[0] = Some(state.steps[0]);
        state.stopping = Stopping::Held(Some((stop, begun)));
        drop(state);
        for wire in &self.wires {
            self.send(wire, &Message::Where, &[]);
        }
        self.decide();
    }

    /// On rank 0: says where all stop, once all have answered.
    fn decide(&self) {
        let mut state = self.lock();
        let Stopping::Held(Some((stop, begun))) = &state.stopping else { return };
        let Some(begun) = begun.iter().copied().collect::<Option<Vec<u32>>>() else { return };
        let stop = Stop { after: begun.into_iter().max().unwrap_or_default(), ..stop.clone() };
        state.stopping = Stopping::At(stop.clone());
        drop(state);
        self.changed.notify_all();
        for wire in &self.wires {
            self.send(wire, &Message::Stop(stop.clone()), &[]);
        }
    }

    fn next(&self, step: u32) -> Result<Option<Stop>> {
        self.check()?;
        let me = self.me;
        self.until("the agreement where to stop", None, |state| match &state.stopping {
            Stopping::Held(_) => None,
            Stopping::At(stop) if step > stop.after => Some(Some(stop.clone())),
            Stopping::No | Stopping::Asked | Stopping::At(_) => {
                state.steps[me] = step;
                Some(None)
            }
        })
    }

    fn leave(&self) -> Result<()> {
        self.check()?;
        if self.me > 0 {
            self.send(&self.wires[0], &Message::Leave, &[]);
            return self.until("end of the run", Some(0), |state| state.goodbye.then_some(()));
        }
        for rank in 1..self.ranks.len() {
            self.until("end of the run", Some(rank), |state| state.left[rank].then_some(()))?;
        }
        // Before it is said, since from then on the others may close their connections.
        self.lock().goodbye = true;
        for wire in &self.wires {
            self.send(wire, &Message::Goodbye, &[]);
        }
        Ok(())
    }

    /// Another rank is gone, and has not said why.
    fn lose(&self, rank: usize, how: &str) {
        let step = self.lock().steps[rank];
        self.fail(rank, format!("{} {how}{}", self.ranks[rank], last_known(step)));
    }

    /// This rank has failed.
    fn fail_myself(&self, words: &str) {
        let step = self.lock().steps[self.me];
        let at = if step == 0 { "before its first step".into() } else { format!("at step {step}") };
        self.fail(self.me, format!("{} failed {at}: {}", self.ranks[self.me], short(words)));
    }

    /// The run has failed because of `rank`. Everybody is told, once.
    fn fail(&self, rank: usize, text: String) {
        let text = short(&text);
        let mut state = self.lock();
        if state.failure.is_some() || state.goodbye || state.closing {
            return;
        }
        state.failure = Some(text.clone());
        (state.culprit, state.telling) = (Some(rank), true);
        self.failed.store(true, Ordering::Release);
        drop(state);
        self.changed.notify_all();
        let since = Instant::now();
        for wire in &self.wires {
            if wire.rank == rank {
                // Whoever is writing to it shall not wait.
                let _ = wire.stream.shutdown(Shutdown::Both);
            } else if self.me == 0 || self.me == rank {
                self.send_or_cut(wire, &Message::Failed { rank, text: text.clone() }, since);
            }
        }
        self.lock().telling = false;
        self.changed.notify_all();
    }

    /// Writes last words, or, where somebody else is still writing a second after the failure, cuts the connection.
    fn send_or_cut(&self, wire: &Wire, message: &Message, since: Instant) {
        loop {
            if let Ok(mut writer) = wire.writer.try_lock() {
                let _ = writer.set_write_timeout(Some(FAREWELL / 2));
                let _ = writer.write_all(&head(message, 0));
                return;
            }
            if since.elapsed() > FAREWELL / 2 {
                let _ = wire.stream.shutdown(Shutdown::Both);
                return;
            }
            thread::sleep(TICK / 10);
        }
    }

    fn close(&self) {
        let mut state = self.lock();
        while state.telling {
            state = self.sleep(state);
        }
        state.closing = true;
        drop(state);
        self.changed.notify_all();
        for wire in &self.wires {
            let _ = wire.stream.shutdown(Shutdown::Write);
        }
    }

    /// Does what another rank says.
    ///
    /// # Errors
    /// What it says and must not.
    fn heed(&self, from: usize, message: Message, body: Vec<u8>) -> std::result::Result<(), String> {
        let mut state = self.lock();
        let rank_0 = self.me == 0;
        match message {
            Message::Alive { step } => state.steps[from] = step,
            Message::Working { rank, what, millis } if rank < self.ranks.len() && (!rank_0 || rank == from) => {
                drop(state);
                if rank_0 {
                    self.announce(rank, &what, millis);
                } else {
                    let until = Instant::now() + Duration::from_millis(millis).min(LONGEST_WORK);
                    self.lock().working[rank] = (millis > 0).then_some((what, until));
                }
            }
            Message::Failed { rank, text } if rank < self.ranks.len() && (!rank_0 || rank == from) => {
                drop(state);
                self.fail(rank, text);
            }
            Message::Ask { code, why } if rank_0 => {
                drop(state);
                self.hold_all(Stop { after: 0, code, why: short(&why), rank: from });
            }
            Message::At { step } if rank_0 => {
                state.steps[from] = step;
                if let Stopping::Held(Some((_, begun))) = &mut state.stopping {
                    begun[from] = Some(step);
                }
                drop(state);
                self.decide();
            }
            Message::Part(call) if rank_0 => state.inbox[from].push_back((call, body)),
            Message::Leave if rank_0 => state.left[from] = true,
            Message::Where if !rank_0 => {
                if !matches!(state.stopping, Stopping::At(_)) {
                    state.stopping = Stopping::Held(None);
                }
                let step = state.steps[self.me];
                drop(state);
                self.send(&self.wires[0], &Message::At { step }, &[]);
            }
            Message::Stop(stop) if !rank_0 => state.stopping = Stopping::At(stop),
            Message::Answer(call) if !rank_0 => state.inbox[from].push_back((call, body)),
            Message::Goodbye if !rank_0 => state.goodbye = true,
            other => return Err(crate::text::cut(&format!("{other:?}"))),
        }
        self.changed.notify_all();
        Ok(())
    }
}

/// The background thread of a connection.
struct Reader<'a> {
    shared: &'a Shared,
    wire: &'a Wire,
    stream: TcpStream,
    decoder: Decoder,
    /// False once the other side has closed its side, or is not understood.
    open: bool,
    heard: Patience,
}

impl<'a> Reader<'a> {
    fn new(shared: &'a Shared, place: usize, stream: TcpStream, decoder: Decoder) -> Self {
        Reader { shared, wire: &shared.wires[place], stream, decoder, open: true, heard: Patience::new() }
    }

    fn run(mut self) {
        let shared = self.shared;
        let (mut beaten, mut chunk) = (Instant::now(), vec![0; 1 << 16]);
        let (mut failed_for, mut closing_since): (Option<Patience>, Option<Instant>) = (None, None);
        // What came with the end of the meeting is heeded first.
        loop {
            let failed = shared.failed.load(Ordering::Acquire);
            if failed {
                // Read on without heeding, so that last words are not lost by a reset.
                self.decoder = Decoder::default();
            } else {
                self.heed_all();
            }
            let state = shared.lock();
            let (closing, goodbye) = (state.closing, state.goodbye);
            if closing {
                if !self.open || closing_since.get_or_insert_with(Instant::now).elapsed() > FAREWELL {
                    return;
                }
            } else if failed {
                let patience = failed_for.get_or_insert_with(Patience::new);
                if matches!(&state.working[shared.me], Some((_, until)) if *until > Instant::now()) {
                    patience.begin_again();
                }
                if patience.passed() > shared.timeouts.grace
                    && let Some(last_resort) = &shared.last_resort
                {
                    let why = state.failure.clone().unwrap_or_default();
                    drop(state);
                    last_resort(&why);
                    return;
                }
            }
            if !self.open {
                drop(shared.sleep(state));
                continue;
            }
            drop(state);
            let quiet = failed || closing || goodbye;
            if !quiet && beaten.elapsed() >= shared.timeouts.beat() {
                beaten = Instant::now();
                shared.beat(self.wire);
            }
            self.read(&mut chunk, quiet);
        }
    }

    fn heed_all(&mut self) {
        while self.open {
            let rank = self.wire.rank;
            let wrong = match self.decoder.message() {
                Ok(None) => return,
                Ok(Some((message, body))) => self.shared.heed(rank, message, body).err(),
                Err(e) => Some(e.to_string()),
            };
            if let Some(wrong) = wrong {
                self.open = false;
                self.shared.lose(rank, &format!("has sent what no rank sends, {wrong}"));
            }
        }
    }

    /// Reads once. `quiet`: the other side may close its side, and need not be heard of.
    fn read(&mut self, chunk: &mut [u8], quiet: bool) {
        let (shared, rank) = (self.shared, self.wire.rank);
        match self.stream.read(chunk) {
            Ok(n) if n > 0 => {
                self.decoder.push(&chunk[..n]);
                self.heard.begin_again();
                return;
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                ) => {}
            // The process has ended: the system closes its connections, or resets them if it had not read all.
            Ok(_) | Err(_) => {
                self.open = false;
                if !quiet {
                    shared.lose(rank, "has ended without a word, as if it was killed");
                }
            }
        }
        if !quiet && self.open && self.heard.passed() > shared.timeouts.silence {
            let silence = in_words(shared.timeouts.silence);
            shared.lose(rank, &format!("has not been heard of for {silence}"));
        }
    }
}
