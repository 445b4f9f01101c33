//! What is sent to a replica, and what it answers.

use std::sync::atomic::{AtomicU64, Ordering};

use axum::{
    Json,
    body::Bytes,
    extract::{FromRequestParts, State},
    http::{StatusCode, request::Parts},
    response::{IntoResponse, Response},
};
use groupstate::{
    domain::{group::Time, retention::Refused},
    manager::{ManagerError, webhook::Webhook},
};
use serde_json::{Value, json};

use crate::Replica;

/// Webhooks by what they were answered.
#[derive(Default)]
pub struct Answers {
    pub stored: AtomicU64,
    pub never: AtomicU64,
    pub again: AtomicU64,
}

/// When a request came, before its body was read.
pub struct Received(Time);

/// What came of alerts that were sent.
enum Taken {
    /// So many are stored, and what can never be is named.
    Stored {
        alerts: usize,
        refused: Vec<Refused>,
    },
    /// None of them can be stored, now or later.
    Never {
        message: String,
        refused: Vec<Refused>,
    },
    /// They may be stored when they are sent again.
    Again(String),
}

// === impl Replica ===

impl Replica {
    /// Stores the alerts of a webhook.
    async fn take(&self, webhook: Webhook, received: Time) -> Taken {
        if webhook.truncated_alerts > 0 {
            let left_out = webhook.truncated_alerts;
            tracing::warn!(
                left_out,
                "Alertmanager has left out alerts: raise max_alerts"
            );
        }
        let alerts = webhook.len();
        match self.manager.receive(webhook, &self.keys, received).await {
            Ok(None) => Taken::Stored {
                alerts: 0,
                refused: Vec::new(),
            },
            Ok(Some(changed)) if changed.safe => Taken::Stored {
                alerts: alerts.saturating_sub(changed.refused.len()),
                refused: changed.refused,
            },
            Ok(Some(_)) => Taken::Again(
                "stored in the memory of one groupstate instance only, and the outbox is full"
                    .into(),
            ),
            Err(error) => {
                let message = error.to_string();
                match error {
                    ManagerError::AllRefused(refused) => Taken::Never { message, refused },
                    ManagerError::Invalid(_) => Taken::Never {
                        message,
                        refused: Vec::new(),
                    },
                    _ => Taken::Again(message),
                }
            }
        }
    }
}

// === impl Received ===

impl FromRequestParts<Replica> for Received {
    type Rejection = Response;

    async fn from_request_parts(_: &mut Parts, replica: &Replica) -> Result<Self, Response> {
        let received = Time::now();
        if replica.is_behind() {
            let text = "this replica was stopped for a while and does not know when this was sent";
            return Err(replica.answers.to(Taken::Again(text.into())));
        }
        Ok(Self(received))
    }
}

// === impl Taken ===

impl Taken {
    /// What came of both.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Again(message), _) | (_, Self::Again(message)) => Self::Again(message),
            (
                Self::Stored {
                    alerts,
                    mut refused,
                },
                Self::Stored {
                    alerts: more,
                    refused: others,
                },
            ) => {
                refused.extend(others);
                Self::Stored {
                    alerts: alerts + more,
                    refused,
                }
            }
            (
                Self::Stored {
                    alerts,
                    mut refused,
                },
                Self::Never {
                    refused: others, ..
                },
            )
            | (
                Self::Never {
                    refused: others, ..
                },
                Self::Stored {
                    alerts,
                    mut refused,
                },
            ) => {
                refused.extend(others);
                Self::Stored { alerts, refused }
            }
            (
                Self::Never {
                    message,
                    mut refused,
                },
                Self::Never {
                    refused: others, ..
                },
            ) => {
                refused.extend(others);
                Self::Never { message, refused }
            }
        }
    }
}

// === impl Answers ===

impl Answers {
    /// 200 when what can be stored is, 400 when nothing can be, now or later, 503 when it
    /// may be when it is sent again.
    fn to(&self, taken: Taken) -> Response {
        match taken {
            Taken::Stored { alerts, refused } => {
                self.stored.fetch_add(1, Ordering::Relaxed);
                for refused in &refused {
                    tracing::warn!(
                        fingerprint = refused.fingerprint,
                        reason = refused.reason.as_str(),
                        message = refused.message,
                        "an alert was refused"
                    );
                }
                Json(json!({"stored": alerts, "refused": named(&refused)})).into_response()
            }
            Taken::Never { message, refused } => {
                self.never.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(message, "a webhook can never be stored");
                let body = json!({"stored": 0, "refused": named(&refused), "message": message});
                (StatusCode::BAD_REQUEST, Json(body)).into_response()
            }
            Taken::Again(message) => {
                self.again.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(message, "a webhook was not stored");
                (StatusCode::SERVICE_UNAVAILABLE, message).into_response()
            }
        }
    }
}

fn named(refused: &[Refused]) -> Vec<Value> {
    let named = refused.iter().map(|refused| {
        json!({
            "fingerprint": refused.fingerprint,
            "reason": refused.reason.as_str(),
            "message": refused.message,
        })
    });
    named.collect()
}

/// Adds the alerts of a webhook. Alertmanager sends it again if it is answered 503, and
/// drops it if it is answered 400.
pub async fn webhook(
    State(replica): State<Replica>,
    Received(received): Received,
    body: Bytes,
) -> Response {
    let taken = match serde_json::from_slice(&body) {
        Ok(webhook) => replica.take(webhook, received).await,
        Err(error) => Taken::Never {
            message: format!("this is no webhook: {error}"),
            refused: Vec::new(),
        },
    };
    replica.answers.to(taken)
}

/// Adds the alerts that Prometheus or vmalert posts as to an Alertmanager.
pub async fn posted(
    State(replica): State<Replica>,
    Received(received): Received,
    body: Bytes,
) -> Response {
    let webhooks = match Webhook::of_posted(&body, &replica.group_by) {
        Ok(webhooks) => webhooks,
        Err(error) => {
            return replica.answers.to(Taken::Never {
                message: format!("this is no list of alerts: {error}"),
                refused: Vec::new(),
            });
        }
    };
    let mut taken = None;
    for webhook in webhooks {
        let next = replica.take(webhook, received).await;
        taken = Some(match taken {
            None => next,
            Some(taken) => Taken::and(taken, next),
        });
    }
    replica.answers.to(taken.unwrap_or(Taken::Stored {
        alerts: 0,
        refused: Vec::new(),
    }))
}
